"""Names and versions of schemas, and the one check that readers make."""

import pyarrow as pa

SCHEMA_KEY = b"alphatoken.schema"


class SchemaMismatch(ValueError):
    """A Parquet file does not have the schema that its place in the run directory promises."""


def versioned(name: str, version: int, fields: list[pa.Field]) -> pa.Schema:
    """A schema that carries ``name/version`` in its metadata."""
    return pa.schema(fields, metadata={SCHEMA_KEY: f"{name}/{version}".encode()})


def check(schema: pa.Schema, expected: pa.Schema, where: str) -> None:
    """Raise SchemaMismatch unless ``schema`` has the columns, types and version of ``expected``.

    ``where`` names the file in the message.
    """
    found = (schema.metadata or {}).get(SCHEMA_KEY)
    wanted = (expected.metadata or {})[SCHEMA_KEY]
    if found != wanted:
        raise SchemaMismatch(f"{where}: schema is {(found or b'unnamed').decode()}, expected {wanted.decode()}")
    if not schema.equals(expected, check_metadata=False):
        raise SchemaMismatch(f"{where}: columns are {schema.names}, expected {expected.names}")
