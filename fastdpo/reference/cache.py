"""The reference's log-probs on disk: one SQLite file for all models and data sets, and safe to kill.

A pack is what one forward of a fill computed: its responses' keys, lengths and values, and a digest of
all that. Packs are written once, and nothing is believed that its digest does not confirm. A value once
stored never changes: of two processes that compute a response, the first to commit decides for both.
"""

import hashlib
import json
import sqlite3
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from fastdpo.data.store.digests import BYTES
from fastdpo.reference.cache_file import CacheFile, cannot_write, transaction
from fastdpo.reference.fingerprint import Fingerprint
from fastdpo.reference.values import FLOAT, Values, as_keys

COMMIT_SECONDS = 1.0  # a kill loses what was computed since the last commit; 0 commits every pack
_COMMIT_SHARE = 0.02  # ... or rarer: a slow disk's commits may take this share of a fill's time
_AT_ONCE = 64  # packs that are taken over at once
_INSERT_PACK = "INSERT INTO packs (namespace, fill, digest, keys, lengths, logps) VALUES (?, ?, ?, ?, ?, ?)"


class RefCache(CacheFile):
    """The log-probs of the wanted responses under one fingerprint: `values` are those known.

    Without a path they are of this process only. Use it in `with`.
    """

    def __init__(self, path: Path | None, fingerprint: Fingerprint, wanted: np.ndarray, console):
        """wanted: keys, V16[n], sorted and each once."""
        super().__init__(path, console)
        self.values = Values(wanted, path and path.parent)
        self._fingerprint = fingerprint
        self._namespace = bytes.fromhex(fingerprint.namespace)
        self._pending: list[dict[bytes, np.ndarray]] = []  # per computed pack, what is not stored yet
        self._environment: dict = {}
        self._read: sqlite3.Connection | None = None  # the one that the next three are of
        self._fill: int | None = None  # this process's row in fills
        self._last_pack = 0  # packs up to here have been read
        self._damaged: list[tuple[int, int]] = []  # (pack, responses in it)
        self._committed, self._commit_took = time.monotonic(), 0.0
        self.run(self._load)

    def start_fill(self, environment: dict) -> None:
        """Records what will compute; call before the first `add`. Raises ConfigError where the file
        cannot be written, before anything is computed for it."""
        self._environment = environment
        self.run(self._store)

    def add(self, keys: np.ndarray, lengths: np.ndarray, values: np.ndarray) -> None:
        """A computed pack: V16[n], i32[n] and f32. A response that is known keeps its value. Commits when it
        is time."""
        if self.path is None:
            self.values.add(keys, lengths, values)
            return
        each = zip(keys.tolist(), np.split(values, np.cumsum(lengths)[:-1]), self.values.known(keys))
        self._pending.append({key: value for key, value, known in each if not known})
        self.values.add(keys, lengths, values)
        due = COMMIT_SECONDS * max(1.0, self._commit_took / _COMMIT_SHARE)
        if time.monotonic() - self._committed >= due:
            self.commit()

    def commit(self) -> None:
        """Stores everything added so far in one transaction."""
        if self._pending:
            start = time.monotonic()
            self.run(self._store)
            self._committed = time.monotonic()
            self._commit_took = self._committed - start

    def parts_of(self, namespace: str) -> dict | None:
        """The recorded parts of another fingerprint, where they are there."""
        found: list[tuple[bytes]] = []
        query = "SELECT parts FROM namespaces WHERE id = ?"
        self.run(lambda db: found.extend(db.execute(query, (bytes.fromhex(namespace),))))
        try:
            return dict(json.loads(found[0][0]))
        except (IndexError, ValueError, TypeError):
            return None

    # What runs on an open file

    def _load(self, db) -> None:
        self.values.clear()
        self._read_new(db)
        orphans = "NOT EXISTS (SELECT 1 FROM namespaces WHERE namespaces.id = packs.namespace)"
        self._damaged += db.execute(f"SELECT id, length(keys) / {BYTES} FROM packs WHERE {orphans}")
        try:
            self._delete_damaged(db)
        except sqlite3.Error as error:
            if not cannot_write(error):
                raise

    def _read_new(self, db) -> None:
        """Takes over the wanted values of the packs that were stored since the last look."""
        if db is not self._read:
            self._read, self._fill, self._last_pack, self._damaged = db, None, 0, []
        query = "SELECT id, digest, keys, lengths, logps FROM packs WHERE id > ? AND namespace = ?"
        found = db.execute(query, (self._last_pack, self._namespace))
        while rows := found.fetchmany(_AT_ONCE):
            self._take_over(rows)

    def _take_over(self, rows: list[tuple]) -> None:
        """(id, digest, keys, lengths, values) of packs: their values, at once."""
        whole, damaged = [], []
        for number, digest, *content in rows:
            if _confirmed(digest, self._namespace, *content):
                whole.append(content)
            else:
                n_keys = len(content[0]) // BYTES if isinstance(content[0], bytes) else 0
                damaged.append((number, n_keys))
        content = [b"".join(column) for column in zip(*whole)] or [b"", b"", b""]
        # in the place of one that is only pending, and of no other
        pending: Any = False
        if self._pending:
            popped = lambda key: [pack.pop(key) for pack in self._pending if key in pack]
            pending = np.array([bool(popped(key)) for key in as_keys(content[0]).tolist()], bool)
        lengths, values = np.frombuffer(content[1], "<i4"), np.frombuffer(content[2], FLOAT)
        self.values.add(as_keys(content[0]), lengths, values, anew=pending)
        self._damaged += damaged
        self._last_pack = rows[-1][0]

    def _delete_damaged(self, db) -> None:
        if not self._damaged:
            return
        for number, responses in self._damaged:
            self.say(f"{self.path}: pack {number} is damaged: its {responses} responses count as not stored")
        damaged, self._damaged = self._damaged, []
        with transaction(db):
            db.executemany("DELETE FROM packs WHERE id = ?", [(number,) for number, _ in damaged])

    def _store(self, db) -> None:
        with transaction(db):
            self._read_new(db)
            # `fastdpo cache prune` may have removed it, and the namespace with it
            there = db.execute("SELECT 1 FROM fills WHERE id = ?", (self._fill,)).fetchone()
            fill, last = self._fill if there else self._insert_fill(db), self._last_pack
            for pack in filter(None, self._pending):
                content = _packed(pack)
                row = (self._namespace, fill, _digest(self._namespace, *content), *content)
                last = db.execute(_INSERT_PACK, row).lastrowid
        self._fill, self._last_pack = fill, last
        self._pending.clear()
        self._delete_damaged(db)

    def _insert_fill(self, db) -> int:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        parts = json.dumps(self._fingerprint.parts)
        db.execute("INSERT OR IGNORE INTO namespaces VALUES (?, ?, ?)", (self._namespace, now, parts))
        row = (self._namespace, now, json.dumps(self._environment))
        insert = "INSERT INTO fills (namespace, started, environment) VALUES (?, ?, ?)"
        return db.execute(insert, row).lastrowid


def _packed(pack: dict[bytes, np.ndarray]) -> tuple[bytes, bytes, bytes]:
    """(keys, lengths, values) of a pack's responses, as they are stored."""
    lengths = np.array([len(value) for value in pack.values()], "<i4")
    values = np.concatenate(list(pack.values())).astype(FLOAT, copy=False)
    return b"".join(pack), lengths.tobytes(), values.tobytes()


def _confirmed(digest, *content) -> bool:
    """Whether these columns, of whatever type they come back, are what was stored."""
    return all(isinstance(part, bytes) for part in (digest, *content)) and _digest(*content) == digest


def _digest(*content: bytes) -> bytes:
    """Of the parts, their lengths and their order."""
    hash_ = hashlib.blake2b(digest_size=16)
    for part in content:
        hash_.update(len(part).to_bytes(8, "little"))
        hash_.update(part)
    return hash_.digest()
