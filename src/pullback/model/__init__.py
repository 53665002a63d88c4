"""What the words mean: values without I/O."""
