"""The protocol, and the code that protoc makes of it (`make proto`)."""
