"""Warm worker: holds a connection to PostgreSQL and runs SQL. The answer is the list of rows, as Python writes it; of
statements without rows it is their status. Each eval is one transaction, unless it says otherwise itself."""

import sys

sys.path.insert(0, "/forkd/workers")

import forkd_worker
import psycopg2

connection = psycopg2.connect("dbname=postgres")
connection.autocommit = True


def run(code, names):
    with connection.cursor() as cursor:
        cursor.execute(code)
        return repr(cursor.fetchall()) if cursor.description else cursor.statusmessage


if __name__ == "__main__":
    forkd_worker.serve(evaluate=run)
