"""What a command does: plan, convert, verify, explain, diff, fingerprint, inspect.

Prints nothing and exits nowhere.
"""
