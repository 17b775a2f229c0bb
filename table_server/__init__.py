"""Table servers: rows held by other processes, reached over gRPC, that lose nothing they acknowledged.

`mfdist serve` runs one (`server`); `RemoteTable` (`client`) is a table like the others, whose rows lie on them. The
protocol is proto/table_v1.proto, and enough to write a client.
"""

if __name__ != "mfdist.table_server":
    raise ImportError("this folder is imported as mfdist.table_server; `table_server` alone may be another's package")
