"""The XML form of documents: text to values and back, nothing else.

One module a document (`backup`, `checkpoint`, `snapshot`, `export`), each with `parse` and
`serialise`; `source` reads hostile text, `shapes` moves between elements and the JSON form, whose
`from_dict` in `pullback.model.documents` has the rules.
"""
