"""Foreign programs, started and ended with deadlines. Blocking: threads call it."""
