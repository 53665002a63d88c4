"""Contract suites and fakes of our own interfaces, for tests of ours and of others."""
