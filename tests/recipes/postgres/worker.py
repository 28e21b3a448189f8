"""Warm worker: starts PostgreSQL, says it is ready, then runs one statement of SQL after the other.

The protocol is that of recipes/python-numpy. The answer is the list of what the first column has, as the role `bench`
gets it, which owns the database `bench`.
"""

import json
import os
import socket
import struct
import subprocess
import sys
import time

# A fixture: what it stores is not worth a sync, and its memory is small.
SETTINGS = {
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
    "autovacuum": "off",
    "wal_level": "minimal",
    "max_wal_senders": "0",
    "min_wal_size": "32MB",
    "max_wal_size": "64MB",
    "shared_buffers": "16MB",
    "max_connections": "30",
    "huge_pages": "off",
    "jit": "off",
    "ssl": "off",
    "logging_collector": "off",
    "log_min_messages": "fatal",
}
DATA = "/var/lib/postgresql/15/main"
SOCKET = "/run/postgresql/.s.PGSQL.5432"


class Postgres:
    """One connection, by PostgreSQL's protocol 3.0 and its simple queries: no driver is worth a package here."""

    def __init__(self, user, database):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(SOCKET)
        self.stream = self.socket.makefile("rb")
        words = b"".join(word.encode() + b"\0" for word in ("user", user, "database", database)) + b"\0"
        self.socket.sendall(struct.pack("!II", 8 + len(words), 196608) + words)
        self.rows()

    def rows(self):
        """The first column of what comes until the server is ready for the next query."""
        rows, error = [], None
        while True:
            kind, length = struct.unpack("!cI", self.stream.read(5))
            body = self.stream.read(length - 4)
            if kind == b"D":
                (width,) = struct.unpack_from("!i", body, 2)
                rows.append(None if width < 0 else body[6 : 6 + width].decode())
            elif kind == b"E":
                fields = dict((field[:1], field[1:].decode()) for field in body.split(b"\0") if field)
                error = fields[b"M"]
                if fields[b"S"] == "FATAL":
                    raise RuntimeError(error)
            elif kind == b"Z":
                if error:
                    raise RuntimeError(error)
                return rows

    def query(self, statement):
        text = statement.encode() + b"\0"
        self.socket.sendall(b"Q" + struct.pack("!I", 4 + len(text)) + text)
        return self.rows()


def is_ready():
    """As pg_ctl looks: asking costs the server a process each time."""
    try:
        with open(f"{DATA}/postmaster.pid") as file:
            return file.read().split("\n")[7].strip() == "ready"
    except (OSError, IndexError):
        return False


def start_postgres():
    """Starts the cluster that Debian's package made, and makes the role and the database of the tests."""
    subprocess.run(["install", "-d", "-o", "postgres", "-g", "postgres", "/run/postgresql"], check=True)
    argv = ["setpriv", "--reuid=postgres", "--regid=postgres", "--init-groups", "/usr/lib/postgresql/15/bin/postgres"]
    argv += ["-D", DATA, "-c", "config_file=/etc/postgresql/15/main/postgresql.conf"]
    for name, value in SETTINGS.items():
        argv += ["-c", f"{name}={value}"]
    server = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=2, stderr=2)
    while not is_ready():
        if server.poll() is not None:
            sys.exit(f"PostgreSQL ended: {server.returncode}")
        time.sleep(0.5)
    admin = Postgres("postgres", "postgres")
    admin.query("create role bench login superuser")
    # By file, not through the log: template0 is not worth 8 MB of it.
    admin.query("create database bench owner bench template template0 encoding 'UTF8' strategy file_copy")
    # What the log has so far is not to be written in every copy.
    admin.query("checkpoint")


def main():
    # What anybody prints goes to standard error; the protocol has a descriptor of its own.
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def reply(**message):
        replies.write(json.dumps(message) + "\n")

    start_postgres()
    bench = Postgres("bench", "bench")
    reply(ready=True)
    for line in sys.stdin:
        request = json.loads(line)
        if request["op"] == "eval":
            try:
                reply(answer=repr(bench.query(request["code"])), error=None)
            except RuntimeError as error:
                reply(answer=None, error=str(error))


if __name__ == "__main__":
    main()
