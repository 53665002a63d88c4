# The records that the writer appends to /mnt/records, one line of 40 bytes each:
#
#   "%010d %010d %08x %08x\n"   number from 1, the guest's clock, a random mark, CRC-32 of all before
#
# The same layout is read on the host (pullback.guest.records). Perl is here because perl-base is
# an essential package of Debian and Ubuntu, and can do O_DIRECT without a compiler. Its modules
# are left out of the initramfs, so nothing is `use`d.

our $RECORDS = "/mnt/records";
our $RECORD_SIZE = 40;

# open(2) flags of x86-64 (asm-generic/fcntl.h), as Fcntl.pm would have them.
our ($O_RDONLY, $O_WRONLY, $O_CREAT, $O_TRUNC, $O_APPEND, $O_DSYNC, $O_DIRECT)
    = (0, 1, 0x40, 0x200, 0x400, 0x1000, 0x4000);

my @crc_table = map {
    my $value = $_;
    $value = $value & 1 ? 0xEDB88320 ^ ($value >> 1) : $value >> 1 for 1 .. 8;
    $value;
} 0 .. 255;

sub crc32 {
    my $crc = 0xFFFFFFFF;
    $crc = $crc_table[($crc ^ $_) & 0xFF] ^ ($crc >> 8) for unpack("C*", $_[0]);
    return $crc ^ 0xFFFFFFFF;
}

sub record {
    my $head = sprintf("%010d %010d %08x ", $_[0], time, rand(0xFFFFFFFF));
    return $head . sprintf("%08x\n", crc32($head));
}

# The number of the last record, or dies with what is wrong. A torn line at the end is no damage:
# it was being appended, and never said to be durable.
sub last_record {
    open(my $file, "<", $RECORDS) or return 0;
    my ($number, $line) = (0);
    while (read($file, $line, $RECORD_SIZE) == $RECORD_SIZE) {
        $number++;
        my ($head, $crc) = (substr($line, 0, 31), substr($line, 31, 8));
        die "record $number is damaged\n" unless sprintf("%08x", crc32($head)) eq $crc;
        die "record $number is numbered $head\n" unless $head =~ /^(\d{10}) / && $1 == $number;
    }
    return $number;
}

# The paths in a directory (`glob` would want a module).
sub listed {
    my ($directory) = @_;
    opendir(my $handle, $directory) or return ();
    return map { "$directory/$_" } sort grep { !/^\./ } readdir($handle);
}

# Ring files are replaced by rename, so each is whole at any moment: blocks of 4096 bytes, every
# one "%016d %016d " (generation, block) and then the same random bytes.
sub check_ring {
    for my $path (grep { !/\.new$/ } listed("/mnt/ring")) {
        open(my $file, "<", $path) or die "$path: $!\n";
        my ($block, $first, $data) = (0);
        while (read($file, $data, 4096)) {
            my $body = substr($data, 34);
            my ($generation, $index) = unpack("A16 x A16", $data);
            $first = [$generation, $body] unless defined $first;
            die "$path is damaged at block $block\n"
                unless $index == $block && $generation == $first->[0] && $body eq $first->[1];
            $block++;
        }
    }
}

sub say_line { syswrite(STDOUT, "PB-$_[0]\n"); }

sub check_all {
    my $last = eval { my $number = last_record(); check_ring(); $number };
    say_line(defined $last ? "CHECK ok last=$last" : "CHECK bad " . ($@ =~ s/\s+$//r));
    return $last;
}

# A buffer for O_DIRECT: a reference to the string and where its first page begins. It must only
# be changed in place, by substr with an equal length.
sub aligned {
    my $raw = "\0" x ($_[0] + 4096);
    return (\$raw, -unpack("J", pack("P", $raw)) % 4096);
}

# Seconds, with a fraction (Time::HiRes is not in perl-base): clock_gettime(CLOCK_MONOTONIC).
sub now {
    my $spec = "\0" x 16;
    syscall(228, 1, $spec);
    my ($seconds, $nanoseconds) = unpack("q q", $spec);
    return $seconds + $nanoseconds / 1e9;
}

sub random_bytes {
    open(my $source, "<", "/dev/urandom") or die "urandom: $!\n";
    read($source, my $bytes, $_[0]) == $_[0] or die "urandom is short\n";
    return $bytes;
}

1;
