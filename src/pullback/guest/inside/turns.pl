# Mode `turns`: counter n is written to disk a, then to disk b, each write complete (O_DIRECT)
# before the next begins. So at any instant the newest counter of a is that of b, or one more.
#
# Block of counter n: 4096 bytes at (n % 256) * spacing, spacing = size / 256 in whole blocks;
# "PBTURN %016d" at its begin and at its last 23 bytes. The host reads it in pullback.guest.turns.

require "/programs/records.pl";
our ($O_WRONLY, $O_DIRECT);

my ($SLOTS, $BLOCK, $MARK) = (256, 4096, 23);
my $stop = 0;
$SIG{TERM} = sub { $stop = 1 };

sub disk {
    my ($path) = @_;
    sysopen(my $file, $path, $O_WRONLY | $O_DIRECT) or die "$path: $!\n";
    my $size = sysseek($file, 0, 2);
    return [$path, $file, int($size / $SLOTS / $BLOCK) * $BLOCK];
}

my @disks = (disk($ENV{PB_a}), disk($ENV{PB_b}));
my ($raw, $skip) = aligned($BLOCK);

sub put {
    my ($disk, $number) = @_;
    my ($path, $file, $spacing) = @$disk;
    sysseek($file, ($number % $SLOTS) * $spacing, 0);
    my $done = syswrite($file, $$raw, $BLOCK, $skip);
    return if defined $done && $done == $BLOCK;
    say_line("IOERROR $path counter $number: $!");
    exit 1;
}

my $number = $ENV{PB_first} // 0;
my ($before, $then) = ($number, now());
say_line("READY");
until ($stop) {
    $number++;
    my $mark = sprintf("PBTURN %016d", $number);
    substr($$raw, $skip, $MARK, $mark);
    substr($$raw, $skip + $BLOCK - $MARK, $MARK, $mark);
    put($disks[0], $number);
    put($disks[1], $number);
    next if $number % 64;
    my $seconds = now() - $then;
    next if $seconds < 1;
    say_line(sprintf("TURN %d rate=%.0f", $number, ($number - $before) / $seconds));
    ($before, $then) = ($number, now());
}
say_line("TURN $number rate=0");
