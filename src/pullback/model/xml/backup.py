"""`domainbackup` as XML.

    <domainbackup mode='pull'>
      <incremental>monday</incremental>
      <server transport='tcp' name='localhost' port='10809' tls='yes'/>
      <disks>
        <disk name='vda' backup='yes' type='file' backupmode='incremental' incremental='monday'
              exportname='vda' exportbitmap='backup-vda' index='3'>
          <driver type='qcow2'/>
          <scratch file='/var/tmp/vda.scratch'>
            <seclabel model='dac' relabel='no'/>
            <encryption format='luks'>
              <secret type='passphrase' usage='/scratch/vda'/>
            </encryption>
          </scratch>
        </disk>
        <disk name='vdb' backup='no'/>
      </disks>
    </domainbackup>

In a push `target` stands for `scratch`; `dev` for `file` where the type is `block`, `uri` where it is
`network`. The rules, and how they differ from libvirt's, are in `pullback.model.documents.backup`.
"""

from __future__ import annotations

from pullback.model.documents.backup import ROOT, BackupDocument, from_dict, to_dict
from pullback.model.documents.fields import Place
from pullback.model.xml import source
from pullback.model.xml.shapes import Kind, Many, One, Shape, Sole, Text, Texts, Wrapped, printed, read, write

_LABEL = Shape(
    attributes={"model": Kind.TEXT, "relabel": Kind.YES_NO, "labelskip": Kind.YES_NO},
    parts={"label": Texts(key="labels")},
)
_SECRET = Shape(attributes={"type": Kind.TEXT, "uuid": Kind.TEXT, "usage": Kind.TEXT})
_CIPHER = Shape(attributes={"name": Kind.TEXT, "size": Kind.NUMBER, "mode": Kind.TEXT, "hash": Kind.TEXT})
_IVGEN = Shape(attributes={"name": Kind.TEXT, "hash": Kind.TEXT})
_ENCRYPTION = Shape(
    attributes={"format": Kind.TEXT, "engine": Kind.TEXT},
    parts={
        "secret": One(key="secret", shape=_SECRET),
        "cipher": One(key="cipher", shape=_CIPHER),
        "ivgen": One(key="ivgen", shape=_IVGEN),
    },
)
_STORE = Shape(
    attributes={"file": Kind.TEXT, "dev": Kind.TEXT, "uri": Kind.TEXT},
    parts={
        "seclabel": Many(key="seclabels", shape=_LABEL),
        "encryption": One(key="encryption", shape=_ENCRYPTION),
    },
)
_DISK = Shape(
    attributes={
        "name": Kind.TEXT,
        "backup": Kind.YES_NO,
        "type": Kind.TEXT,
        "backupmode": Kind.TEXT,
        "incremental": Kind.TEXT,
        "exportname": Kind.TEXT,
        "exportbitmap": Kind.TEXT,
        "index": Kind.NUMBER,
    },
    parts={
        "driver": Sole(key="driver", shape=Shape(attributes={"type": Kind.TEXT}), inner="type"),
        "target": One(key="target", shape=_STORE),
        "scratch": One(key="scratch", shape=_STORE),
    },
)
_SERVER = Shape(
    attributes={
        "transport": Kind.TEXT,
        "tls": Kind.YES_NO,
        "name": Kind.TEXT,
        "port": Kind.NUMBER,
        "socket": Kind.TEXT,
        "fdgroup": Kind.TEXT,
    }
)
_SHAPE = Shape(
    attributes={"mode": Kind.TEXT},
    parts={
        "incremental": Text(key="incremental", may_be_empty=True),
        "server": One(key="server", shape=_SERVER),
        "disks": Wrapped(key="disks", tag="disk", shape=_DISK),
    },
)


def parse(text: bytes | str) -> BackupDocument:
    """The document in `text`. Raises `BadDocument`, and nothing else, for whatever is wrong with it."""
    return from_dict(read(source.root(text, ROOT), _SHAPE, Place(document=ROOT)))


def serialise(document: BackupDocument) -> str:
    """The document as XML, which reads back equal; `BadDocument` if its values break a rule."""
    return printed(write(ROOT, to_dict(from_dict(to_dict(document))), _SHAPE))
