"""The documents that describe backups, checkpoints, snapshots and exports: values, their JSON, their defaults.

    backup       `domainbackup`           a job, as `virDomainBackupBegin` takes it
    checkpoint   `domaincheckpoint`       a checkpoint, as `virDomainCheckpointCreateXML` takes it
    snapshot     `domainblocksnapshot`    a temporary snapshot (the external backup API of 2018)
    export       `domainblockexport`      what is served over NBD (the same)

Each module has the values, `to_dict` and `from_dict` (the JSON form; its docstring is the schema) and
`effective`, which fills in what the document leaves open and checks it against the machine's disks.
The XML form of each is in `pullback.model.xml`, under the same name. Both forms go through
`from_dict`, so a rule is written once, and every refusal is a `BadDocument` with the field's name.
"""
