"""Names and versions of schemas, and the one check that readers make."""

import pyarrow as pa

SCHEMA_KEY = b"alphatoken.schema"


class SchemaMismatch(ValueError):
    """A Parquet file does not have the schema that its place in the run directory promises."""


def versioned(name: str, version: int, fields: list[pa.Field]) -> pa.Schema:
    """A schema that carries ``name/version`` in its metadata."""
    return pa.schema(fields, metadata={SCHEMA_KEY: f"{name}/{version}".encode()})


def named(schema: pa.Schema) -> str:
    """The ``name/version`` that a schema carries."""
    return (schema.metadata or {}).get(SCHEMA_KEY, b"unnamed").decode()


def check(schema: pa.Schema, expected: pa.Schema, where: str) -> None:
    """Raise SchemaMismatch unless ``schema`` has the columns, types and version of ``expected``.

    ``where`` names the file in the message.
    """
    if named(schema) != named(expected):
        raise SchemaMismatch(f"{where}: schema is {named(schema)}, expected {named(expected)}")
    if not schema.equals(expected, check_metadata=False):
        raise SchemaMismatch(f"{where}: columns are {schema.names}, expected {expected.names}")
