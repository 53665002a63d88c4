# Beside every mode: kernel messages that tell of failed or hanging I/O are repeated as
# PB-IOERROR, and the ACPI power button ends the guest cleanly.

require "/programs/records.pl";
our $O_RDONLY;

my ($EV_KEY, $KEY_POWER, $EVENT_SIZE) = (1, 116, 24);    # linux/input-event-codes.h, 64 bit
my @buttons;
for my $path (grep { m{/event\d+$} } listed("/dev/input")) {
    sysopen(my $file, $path, $O_RDONLY) or die "$path: $!\n";
    push @buttons, $file;
}
sysopen(my $log, "/dev/kmsg", $O_RDONLY) or die "kmsg: $!\n";
sysseek($log, 0, 2);    # no disk was used yet, and 400 messages of booting take a second to read

sub read_log {
    # One read gives one message, "priority,number,time,flags;text"; EPIPE means some were lost.
    defined sysread($log, my $message, 8192) or return;
    my ($text) = $message =~ /^[^;]*;([^\n]*)/ or return;
    say_line("IOERROR kernel: $text")
        if $text =~ m{I/O error|critical \w+ error|EXT4-fs error|Aborting journal|hung task|blocked for more than};
}

sub read_button {
    my ($file) = @_;
    sysread($file, my $event, $EVENT_SIZE) or return;
    my ($type, $code, $value) = unpack("x16 S S l", $event);
    kill("TERM", 1) if $type == $EV_KEY && $code == $KEY_POWER && $value == 1;
}

while (1) {
    my $waiting = "";
    vec($waiting, fileno($_), 1) = 1 for $log, @buttons;
    select($waiting, undef, undef, undef) > 0 or next;
    read_log() if vec($waiting, fileno($log), 1);
    for my $file (@buttons) {
        read_button($file) if vec($waiting, fileno($file), 1);
    }
}
