"""The kitchen: backup, restore, verify … over the rooms below. What a program calls."""
