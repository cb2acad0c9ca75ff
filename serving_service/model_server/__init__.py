"""The program inside a replica: loads one MLflow model and answers for it on a socket that it inherits.

It runs in the model's process and may be another interpreter than the services': it imports nothing of theirs.
"""
