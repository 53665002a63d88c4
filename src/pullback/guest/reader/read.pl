# What reads file systems: in the reader, a machine of its own without network, and (`--trust`) in a process on the
# host. Perl, because perl-base is an essential package of Debian and Ubuntu; nothing is `use`d.
#
# The host asks, one question at a time, and gets frames until one that ends the answer:
#
#   question   length (4 bytes, big endian), then fields with a zero byte between them: the verb, and its words
#   frame      length of the data (4 bytes), kind (1 byte), data
#
# Kinds:  V a volume    E an entry of a directory    D bytes of a file    Z a hole (its length, 8 bytes)
#         e end of a file    u end of a directory    W something that could not be read (errno, name, text)
#         . end of the answer (fields)    ! end: it failed (errno, text)
# Whoever reads this must not believe a word of it: behind it is somebody else's disk.

my $PIECE = 262144;
my $DEEPEST = 512;
# Below it each mount has its directory.
my $PLACE = $ENV{PB_PLACE} // "/m";
my ($port, @disks);
my %seen;          # files with several names that were sent: "device:inode" to their number
my $count = 0;     # entries sent by a `tree`

# -- frames ----------------------------------------------------------------------------------

sub put {
    my ($data) = @_;
    my $at = 0;
    while ($at < length $data) {
        my $done = syswrite($port, $data, length($data) - $at, $at);
        next if !defined $done && $! + 0 == 4;    # EINTR
        exit(1) unless $done;
        $at += $done;
    }
}

sub frame { my ($kind, $data) = @_; put(pack("N a", length $data, $kind) . $data) }
sub fields { frame($_[0], join("\0", @_[1 .. $#_])) }

sub get {
    my ($length) = @_;
    my $data = "";
    while (length $data < $length) {
        my $done = sysread($port, $data, $length - length $data, length $data);
        return undef unless $done;
    }
    return $data;
}

# Ends a question: "! errno text".
sub failed { my ($number, $text) = @_; die [$number, $text] }

sub serve {
    ($port, @disks) = @_;
    binmode($port);
    fields(".", "pullback-reader", 1);
    while (defined(my $head = get(4))) {
        my $question = get(unpack("N", $head));
        last unless defined $question;
        my ($verb, @words) = split(/\0/, $question, -1);
        eval { answer($verb, @words); 1 } and next;
        my $problem = $@;
        next if ref $problem && $problem->[0] < 0;    # a child has said it
        fields("!", ref $problem ? @$problem : (0, "$problem"));
    }
}

my %VERBS;

sub answer {
    my ($verb, @words) = @_;
    my $does = $VERBS{$verb} or failed(38, "no verb $verb");
    fields(".", $does->(@words));
}

# -- drivers ---------------------------------------------------------------------------------

sub insert {
    my ($path) = @_;
    my $options = "";
    open(my $file, "<", $path) or return;
    syscall(313, fileno($file), $options, 0);    # finit_module(2); one that is there already is fine
}

sub drivers {
    my ($wanted) = @_;
    open(my $index, "<", "/later/index") or return;    # on the host: its kernel loads them itself
    while (defined(my $line = <$index>)) {
        chomp $line;
        my ($name, @chain) = split(/ /, $line);
        insert("/later/$_.ko") for $name eq $wanted ? @chain : ();
    }
}

# -- disks, partitions, volumes --------------------------------------------------------------

sub text_of {
    my ($path) = @_;
    open(my $file, "<", $path) or return "";
    my $text = <$file> // "";
    chomp $text;
    return $text;
}

sub names_in {
    my ($path) = @_;
    opendir(my $directory, $path) or return ();
    return sort grep { !/^\.\.?$/ } readdir($directory);
}

# The disks of the machine: [number, kernel's name], by the serial numbers that the host gave them. (On the host, whose
# kernel may know no partitions, they are given too: [number, kernel's name, partition].)
sub disks {
    my @found;
    for my $name (names_in("/sys/block")) {
        push @found, [$1, $name] if text_of("/sys/block/$name/serial") =~ /^pb(\d+)$/;
    }
    return sort { $a->[0] <=> $b->[0] } @found;
}

sub output_of {
    my (@words) = @_;
    defined(my $child = open(my $output, "-|")) or return "";
    if ($child == 0) {
        open(STDERR, ">", "/dev/null");
        exec { $words[0] } @words;
        exit(127);
    }
    local $/;
    my $text = <$output> // "";
    close($output);
    return substr($text, 0, 1048576);
}

sub program {
    my ($name) = @_;
    for my $place ("/bin", "/sbin", "/usr/bin", "/usr/sbin") { return "$place/$name" if -x "$place/$name" }
    return undef;
}

# One block device: what it is, where it is, and what is on it, as blkid tells (with \xNN for odd characters).
sub volume {
    my ($kind, $key, $disk, $number, $size, @more) = @_;
    my $blkid = program("blkid");
    my $told = defined $blkid ? output_of($blkid, "-p", "-o", "udev", $key) : "";
    fields("V", $kind, $key, $disk, $number, $size, "@more", $told);
    return $told;
}

sub scan {
    my $told = "";
    for my $disk (@disks) {
        my ($number, $name, $given) = @$disk;
        if ($given) {
            volume("part", "/dev/$name", $number, $given, 512 * text_of("/sys/block/$name/size"));
            next;
        }
        $told .= volume("disk", "/dev/$name", $number, 0, 512 * text_of("/sys/block/$name/size"));
        my @parts = grep { -e "/sys/block/$name/$_/partition" } names_in("/sys/block/$name");
        my %part = map { $_ => text_of("/sys/block/$name/$_/partition") } @parts;
        for my $part (sort { $part{$a} <=> $part{$b} } @parts) {
            my $size = 512 * text_of("/sys/block/$name/$part/size");
            $told .= volume("part", "/dev/$part", $number, $part{$part}, $size);
        }
    }
    # Not on the host: there, groups of volumes could be taken for the host's own.
    logical() if -e "/later/index" && program("lvm") && $told =~ /^ID_FS_TYPE=LVM2_member$/m;
    return ();
}

our $LVM = 'activation{udev_sync=0 udev_rules=0 monitoring=0} global{use_lvmpolld=0 thin_check_executable="" '
    . 'cache_check_executable="" locking_type=1 file_locking_dir="/run"} devices{use_devicesfile=0 '
    . 'obtain_device_list_from_udev=0 write_cache_state=0 multipath_component_detection=0} backup{backup=0 archive=0}';

sub lvm { my ($verb, @words) = @_; return output_of(program("lvm"), $verb, "--config", $LVM, @words) }

# Logical volumes are activated; of kinds whose driver is not there, not.
sub logical {
    my $kinds = lvm("lvs", "--noheadings", "-a", "-o", "segtype");
    return unless $kinds =~ /\w/;
    my %driver = (thin => "dm_thin_pool", "thin-pool" => "dm_thin_pool", snapshot => "dm_snapshot",
        mirror => "dm_mirror", cache => "dm_cache_smq", "cache-pool" => "dm_cache_smq", writecache => "dm_writecache");
    drivers("dm_mod");
    drivers("dm_mirror");
    for my $kind ($kinds =~ /(\S+)/g) {
        drivers("dm_cache") if $kind =~ /^cache/;
        drivers($driver{$kind}) if $driver{$kind};
        drivers($_) for $kind =~ /^raid/ ? ("dm_raid", "raid1", "raid10", "raid456") : ();
    }
    lvm("vgchange", "-ay");
    my $told = lvm("lvs", "--noheadings", "--nosuffix", "--units", "b", "--separator", "|",
        "-o", "vg_name,lv_name,lv_size,lv_active,lv_layout,lv_dm_path");
    for my $line (split /\n/, $told) {
        $line =~ s/^\s+//;
        my ($group, $name, $size, $active, $layout, $path) = split /\|/, $line;
        next if $layout =~ /\bpool\b/;
        volume("lv", $active eq "active" ? $path : "", 0, 0, int($size), "$group/$name");
    }
}

# -- file systems ----------------------------------------------------------------------------

my ($RDONLY, $NOSUID, $NODEV, $NOEXEC, $NOATIME) = (1, 2, 4, 8, 1024);
my $mounts = 0;

# Mounts a volume for reading; the answer is the number by which it is named then. With `under` (a mount's number)
# and a path, it is mounted there and has no number of its own.
sub mount_volume {
    my ($key, $type, $data, $under, $path) = @_;
    my $place = "$PLACE/" . ++$mounts;
    if (defined $under && length $under) {
        $place = "$PLACE/$under" . resolved("$PLACE/$under", $path);
        -d $place or failed(20, "no directory");
    } else {
        mkdir($place) or failed($! + 0, "$!");
    }
    drivers($_) for $type, $type =~ /fat$|^iso9660$/ ? ("nls_cp437", "nls_ascii", "nls_utf8") : ();
    drivers("isofs") if $type eq "iso9660";
    if ($type eq "ntfs-3g") {
        drivers("fuse");
        ntfs($key, $place, $data);
        return $mounts;
    }
    my $flags = $RDONLY | $NOSUID | $NODEV | $NOEXEC | $NOATIME;
    my $done = syscall(165, "$key", "$place", "$type", $flags, "$data");
    failed($! + 0, "$!") if $done != 0;
    return $mounts;
}

sub ntfs {
    my ($key, $place, $options) = @_;
    my $program = program("ntfs-3g") or failed(19, "there is no ntfs-3g");
    mkdir("/etc");    # which it wants to be there
    my $words = "ro,nosuid,nodev,noexec" . (length $options ? ",$options" : "");
    my $status = system { $program } $program, "-o", $words, $key, $place;
    failed(22, "ntfs-3g ended with " . ($status >> 8)) if $status != 0;
}

sub unmount {
    my ($number) = @_;
    syscall(166, "$PLACE/$number", 0) == 0 or failed($! + 0, "$!");
    return ();
}

# Where `path` leads below `root`, by the rules of that file system's own root; for a child that does not come back.
sub enter {
    my ($number) = @_;
    chroot("$PLACE/$number") or failed($! + 0, "$!");
    chdir("/") or failed($! + 0, "$!");
}

# As a path without links, found in a child, because a root cannot be left again.
sub resolved {
    my ($root, $path) = @_;
    defined(my $child = open(my $answer, "-|")) or failed($! + 0, "$!");
    if ($child == 0) {
        chroot($root) && chdir($path) or exit(1);
        my $here = "\0" x 4096;
        my $length = syscall(79, $here, 4096);    # getcwd(2)
        exit(1) if $length <= 0;
        syswrite(STDOUT, substr($here, 0, $length - 1));
        exit(0);
    }
    local $/;
    my $found = <$answer> // "";
    close($answer);
    failed(2, "No such directory") unless $? == 0 && $found =~ m{^/};
    return $found;
}

# Runs `work` in a child whose root is the mount's; its frames go straight to the port.
sub inside {
    my ($number, $work) = @_;
    defined(my $child = fork()) or failed($! + 0, "$!");
    if ($child == 0) {
        eval { enter($number); $work->(); 1 } and exit(0);
        my $problem = $@;
        fields("!", ref $problem ? @$problem : (0, "$problem"));
        exit(2);
    }
    waitpid($child, 0);
    failed(-1, "") if $? == 512;
    failed(5, "the reading process ended with $?") if $? != 0;
    return ();
}

# -- what is in them -------------------------------------------------------------------------

sub kind_of {
    my ($mode) = @_;
    my %kinds = (0100000 => "f", 0040000 => "d", 0120000 => "l", 0020000 => "c", 0060000 => "b", 0010000 => "p",
        0140000 => "s");
    return $kinds{$mode & 0170000} // "?";
}

# kind mode uid gid size mtime links device-of-a-node name target number: the number is that of the same file under
# another name in this answer, or 0.
sub entry {
    my ($path, $name, $same) = @_;
    my @stat = lstat($path);
    unless (@stat) { fields("W", $! + 0, $path, "$!"); return undef }
    my ($device, $inode, $mode, $links, $uid, $gid, $node, $size, $mtime) = @stat[0 .. 7, 9];
    my $kind = kind_of($mode);
    my $target = $kind eq "l" ? readlink($path) // "" : "";
    $count++;
    my $number = 0;
    if ($same && $kind eq "f" && $links > 1) {
        my $key = "$device:$inode";
        $number = $seen{$key} // 0;
        $seen{$key} = $count unless $number;
    }
    fields("E", $kind, $mode & 07777, $uid, $gid, $size, $mtime, $links, $node, $name, $target, $number);
    return ($kind, $number, $size, $stat[12] // 0);
}

sub sorted_names {
    my ($path) = @_;
    opendir(my $directory, $path) or failed($! + 0, "$!");
    my @names;
    $! = 0;
    while (defined(my $name = readdir($directory))) {
        push @names, $name unless $name eq "." || $name eq "..";
        $! = 0;
    }
    fields("W", $! + 0, $path, "$!") if $! + 0;
    return sort @names;
}

sub below { my ($path, $name) = @_; return $path =~ m{/$} ? "$path$name" : "$path/$name" }

sub list {
    my ($number, $path) = @_;
    return inside($number, sub {
        my @stat = stat($path);
        @stat || lstat($path) or failed($! + 0, "$!");
        if (@stat && ($stat[2] & 0170000) == 0040000) {
            entry(below($path, $_), $_, 0) for sorted_names($path);
        } else {
            entry($path, $path, 0);
        }
    });
}

# One thing, and what it holds. A link is followed if `follow`.
sub tree {
    my ($number, $path, $follow) = @_;
    return inside($number, sub {
        if ($follow) {
            my @stat = stat($path) or failed($! + 0, "$!");
            if (($stat[2] & 0170000) == 0040000) {
                chdir($path) or failed($! + 0, "$!");
                $path = ".";
            } elsif (-l $path) {
                return linked_file($path, @stat);
            }
        }
        lstat($path) or failed($! + 0, "$!");
        branch($path, $path, 0);
    });
}

sub linked_file {
    my ($path, @stat) = @_;
    my ($mode, $links, $uid, $gid, $node, $size, $mtime) = @stat[2 .. 7, 9];
    fields("E", kind_of($mode), $mode & 07777, $uid, $gid, $size, $mtime, 1, $node, $path, "", 0);
    content($path, $size, $stat[12] // 0) if kind_of($mode) eq "f";
}

sub branch {
    my ($path, $name, $depth) = @_;
    my ($kind, $same, $size, $blocks) = entry($path, $name, 1);
    return unless defined $kind;
    if ($kind eq "f" && !$same) {
        content($path, $size, $blocks);
    } elsif ($kind eq "d") {
        if ($depth >= $DEEPEST) {
            fields("W", 40, $path, "more than $DEEPEST directories deep");
        } elsif (my @names = eval { sorted_names($path) }) {
            branch(below($path, $_), $_, $depth + 1) for @names;
        } elsif ($@) {
            fields("W", ref $@ ? ($@->[0], $path, $@->[1]) : (0, $path, "$@"));
        }
        frame("u", "");
    }
}

# A file's bytes, its holes left out where the file system tells them. Ends with "e", or with "W" if it cannot be read.
sub content {
    my ($path, $size, $blocks) = @_;
    my $file;
    unless (sysopen($file, $path, 0x20000)) {    # O_NOFOLLOW
        sysopen($file, $path, 0) or return fields("W", $! + 0, $path, "$!");
    }
    my $sparse = $blocks * 512 < $size;
    my $at = 0;
    while ($at < $size) {
        my $end = $size;
        if ($sparse) {
            my $data = sysseek($file, $at, 3);    # SEEK_DATA
            $data = $size if !defined $data && $! + 0 == 6;    # ENXIO: nothing but a hole
            if (defined $data && $data > $at) {
                $data = $size if $data > $size;
                frame("Z", pack("Q>", $data - $at));
                $at = $data;
                next;
            }
            my $hole = sysseek($file, $at, 4);    # SEEK_HOLE
            $end = $hole if defined $hole && $hole > $at && $hole < $size;
            sysseek($file, $at, 0);
        }
        while ($at < $end) {
            my $done = sysread($file, my $bytes, $end - $at < $PIECE ? $end - $at : $PIECE);
            return fields("W", $! + 0, $path, "$!") unless defined $done;
            return fields("W", 5, $path, "it ends before its size") if $done == 0;
            put(pack("N a", $done, "D"));
            put($bytes);
            $at += $done;
        }
    }
    frame("e", "");
}

# -- checking --------------------------------------------------------------------------------

my %CHECKS = (
    ext4     => [["e2fsck", "-fn"]],
    xfs      => [["xfs_repair", "-n"]],
    btrfs    => [["btrfs", "check", "--readonly"]],
    # The first takes away the mark of a file system that is in use; then nothing may be wrong.
    vfat     => [["fsck.fat", "-a"], ["fsck.fat", "-n"]],
);

# Checks a volume that was mounted once (so its journal is replayed) and is not now. Answer: status, and D frames.
sub check {
    my ($key, $type) = @_;
    my $steps = $CHECKS{$type} or failed(95, "nothing here checks $type");
    my $status = 0;
    for my $step (@$steps) {
        my ($name, @words) = @$step;
        my $path = program($name) or failed(2, "there is no $name");
        defined(my $child = open(my $output, "-|")) or failed($! + 0, "$!");
        if ($child == 0) {
            open(STDIN, "<", "/dev/null");
            open(STDERR, ">&", \*STDOUT);
            exec { $path } $path, @words, $key;
            exit(127);
        }
        my $left = 65536;
        while (sysread($output, my $text, 4096)) {
            $text = substr($text, 0, $left);
            $left -= length $text;
            frame("D", $text) if length $text;
        }
        close($output);
        $status = $? & 127 ? 128 + ($? & 127) : $? >> 8;
    }
    return ($status);
}

%VERBS = (
    scan    => sub { scan() },
    mount   => \&mount_volume,
    unmount => \&unmount,
    list    => \&list,
    tree    => \&tree,
    check   => \&check,
);

1;
