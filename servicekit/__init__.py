"""What makes a process one of our services. Nothing in this package uses a word of any service's own vocabulary."""
