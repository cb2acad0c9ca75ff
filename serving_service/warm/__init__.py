"""The template: one process that has imported what every model server imports, and from which replicas are forked.

Importing is nearly all that a start of a model server takes, and nearly all the memory that it needs. Here it is done
once, and shared. Rule: nothing of a model is ever read or run in this process, it holds nothing that is secret, and it
has one thread; so what is forked from it is whole, and nobody's.
"""

OK = b"ok"
"""What a shim says once it is detached and owns its sockets; anything else is what was in the way."""
