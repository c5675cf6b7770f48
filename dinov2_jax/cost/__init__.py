"""What a compiled step costs, read from the compiler's own output: no accelerator is needed."""
