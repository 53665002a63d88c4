"""A restore point for other programs: its disks' bytes on request, proven, from a bounded cache. Threads."""
