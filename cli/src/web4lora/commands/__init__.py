"""The commands: each parses its options, calls the client or the stack, and hands the answer to a view."""
