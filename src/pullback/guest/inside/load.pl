# Mode `load`: random O_DIRECT writes of 4 to 64 KiB on one disk, by several processes at a time.
#
#   pb.disk             the device
#   pb.start pb.length  the range in bytes (the whole disk)
#   pb.jobs             how many processes (4)
#   pb.pause            milliseconds between the writes of one process (0)

require "/programs/records.pl";
our ($O_WRONLY, $O_DIRECT);

my $path = $ENV{PB_disk};
my $jobs = $ENV{PB_jobs} // 4;
my $pause = ($ENV{PB_pause} // 0) / 1000;
my $stop = 0;

sub job {
    my ($job) = @_;
    sysopen(my $file, $path, $O_WRONLY | $O_DIRECT) or die "$path: $!\n";
    my $start = $ENV{PB_start} // 0;
    my $length = $ENV{PB_length} // sysseek($file, 0, 2) - $start;
    my ($raw, $skip) = aligned(65536);
    substr($$raw, $skip, 65536, random_bytes(65536));
    srand($job + 1);
    my ($writes, $slowest, $told) = (0, 0, now());
    until ($stop) {
        my $size = 4096 * (1 + int(rand(16)));
        my $offset = $start + 4096 * int(rand(($length - $size) / 4096 + 1));
        substr($$raw, $skip, 32, sprintf("PBLOAD %010d %014d", $writes, $offset));
        sysseek($file, $offset, 0);
        my $begin = now();
        my $done = syswrite($file, $$raw, $size, $skip);
        my $end = now();
        unless (defined $done && $done == $size) {
            say_line("IOERROR $path offset $offset: $!");
            select(undef, undef, undef, 0.2);
        }
        $writes++;
        $slowest = $end - $begin if $end - $begin > $slowest;
        if ($end - $told >= 1) {
            say_line(sprintf("LOAD job=%d writes=%d slowest_ms=%.1f", $job, $writes, $slowest * 1000));
            ($told, $slowest) = ($end, 0);
        }
        select(undef, undef, undef, $pause) if $pause > 0;
    }
    exit 0;
}

$SIG{TERM} = sub { $stop = 1 };
my @children;
for my $job (0 .. $jobs - 1) {
    my $child = fork();
    die "fork: $!\n" unless defined $child;
    job($job) if $child == 0;
    push @children, $child;
}
say_line("READY");
until ($stop) { select(undef, undef, undef, 1) }
kill("TERM", @children);
1 while wait() > 0;
