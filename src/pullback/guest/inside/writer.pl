# Mode `writer`: what is there is checked, then records are appended, each durable (O_DSYNC)
# before its number is printed. Between them the disk is kept moving: ring files replaced, a file
# overwritten in place, files made and deleted, `sync` now and then.
#
#   pb.interval   milliseconds between records (20)
#   pb.noise      MiB of the file that is overwritten in place (8)

require "/programs/records.pl";
our ($RECORDS, $RECORD_SIZE, $O_WRONLY, $O_CREAT, $O_TRUNC, $O_APPEND, $O_DSYNC);

my $interval = ($ENV{PB_interval} // 20) / 1000;
my $noise_size = ($ENV{PB_noise} // 8) << 20;
my ($RING, $JUNK, $BLOCKS) = (16, 8, 32);
my $stop = 0;
$SIG{TERM} = sub { $stop = 1 };

sub write_file {
    my ($path, $flags, @parts) = @_;
    sysopen(my $file, $path, $O_WRONLY | $O_CREAT | $flags) or die "$path: $!\n";
    for my $part (@parts) {
        my $done = syswrite($file, $part);
        die "$path: $!\n" unless defined $done && $done == length $part;
    }
    close($file) or die "$path: $!\n";
}

sub replace_ring {
    my ($generation) = @_;
    my $path = sprintf("/mnt/ring/%02d", int($generation) % $RING);
    my $body = random_bytes(4096 - 34);
    my @blocks = map { sprintf("%016d %016d ", $generation, $_) . $body } 0 .. $BLOCKS - 1;
    write_file("$path.new", $O_TRUNC | $O_DSYNC, join("", @blocks));
    rename("$path.new", $path) or die "$path: $!\n";
}

sub overwrite_noise {
    sysopen(my $file, "/mnt/noise", $O_WRONLY | $O_CREAT) or die "noise: $!\n";
    for (1 .. 8) {
        sysseek($file, int(rand($noise_size / 4096)) * 4096, 0);
        defined syswrite($file, random_bytes(16384)) or die "noise: $!\n";
    }
    close($file) or die "noise: $!\n";
}

sub make_and_delete {
    my ($generation) = @_;
    write_file("/mnt/junk/$generation", 0, random_bytes(65536 + int(rand(262144))));
    unlink("/mnt/junk/" . ($generation - $JUNK * 32));
}

sub move_disk {
    my ($number) = @_;
    replace_ring($number / 8) if $number % 8 == 0;
    overwrite_noise() if $number % 16 == 4;
    make_and_delete($number) if $number % 32 == 1;
    syscall(162) if $number % 64 == 2;    # sync(2)
}

my $number = check_all();
exit 1 unless defined $number;
mkdir "/mnt/ring";
mkdir "/mnt/junk";
truncate($RECORDS, $number * $RECORD_SIZE) if -e $RECORDS;    # a torn line at the end
sysopen(my $records, $RECORDS, $O_WRONLY | $O_CREAT | $O_APPEND | $O_DSYNC) or die "records: $!\n";
say_line("READY");
until ($stop) {
    $number++;
    my $done = syswrite($records, record($number));
    unless (defined $done && $done == $RECORD_SIZE) {
        say_line("IOERROR record $number: $!");
        exit 1;
    }
    say_line("RECORD $number");
    eval { move_disk($number); 1 } or say_line("IOERROR " . ($@ =~ s/\s+$//r));
    select(undef, undef, undef, $interval) if $interval > 0;
}
