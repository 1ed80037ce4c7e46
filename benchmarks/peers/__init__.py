"""The servers that people would use instead, each as its own documentation has it."""
