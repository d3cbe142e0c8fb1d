"""What people see: text and tables made from messages; nothing here talks to a service."""
