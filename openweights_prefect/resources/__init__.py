"""The nouns of the SDK: `ow.files`, `ow.jobs`, `ow.runs`, ..."""
