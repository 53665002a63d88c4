# Mode `check`: every record and every ring file of the mounted disk; one line with the verdict.

require "/programs/records.pl";

exit(defined check_all() ? 0 : 1);
