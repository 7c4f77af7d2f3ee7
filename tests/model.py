"""A naive model of the prefix index, without a tree: sets and lists of prefixes.

It is written from the meaning of the operations, and offers the row-based interface of
``mulsched.prefix_index.Backend`` as far as content goes, and the nodes that the content calls for.
"""

from collections import Counter
from itertools import chain, pairwise


def prefixes(path, start=0):
    """Every prefix of a path that is longer than ``start``, the shortest first."""
    return [tuple(path[:n]) for n in range(start + 1, len(path) + 1)]


class ModelIndex:
    def __init__(self):
        self.capacity = {}
        self.order = {}  # unnamed rows: held prefixes, the next to leave first
        self.names = {}  # named rows: engine hash -> the prefix that it names, once for each copy

    def held(self, row):
        return set(chain(*self.names[row].values())) if row in self.names else set(self.order[row])

    def add_row(self, row, capacity, named):
        self.capacity[row] = capacity
        if named:
            self.names[row] = {}
        else:
            self.order[row] = []

    def remove_row(self, row):
        del self.capacity[row]
        self.order.pop(row, None)
        self.names.pop(row, None)

    def clear(self, row):
        if row in self.names:
            self.names[row] = {}
        else:
            self.order[row] = []

    def resize(self, row, capacity):
        self.capacity[row] = capacity
        self._evict(row)

    def _evict(self, row):
        if self.capacity[row] >= 0:
            excess = max(0, len(self.order[row]) - self.capacity[row])
            del self.order[row][:excess]

    def store(self, row, keys):
        path = prefixes(keys)
        newly = len(set(path) - set(self.order[row]))
        self.order[row] = [p for p in self.order[row] if p not in path] + path[::-1]
        self._evict(row)
        return newly

    def store_named(self, row, parent, hashes, keys, counts_copies=True):
        names = self.names[row]
        if parent is not None and parent not in names:
            return -1
        path = () if parent is None else names[parent][0]
        return self.store_named_after(row, path, hashes, keys, counts_copies)

    def store_named_after(self, row, path, hashes, keys, counts_copies=True):
        names, prefix, newly = self.names[row], tuple(path), 0
        before = self.held(row)
        for name, key in zip(hashes, keys, strict=True):
            prefix = (*prefix, key)
            newly += prefix not in before
            copies = names.get(name, [])
            if prefix not in copies:
                names[name] = [prefix]
            elif counts_copies:
                names[name] = [*copies, prefix]
        return newly

    def remove_named(self, row, hashes):
        names, known = self.names[row], 0
        for name in hashes:
            if name in names:
                known += 1
                names[name].pop()
                if not names[name]:
                    del names[name]
        return known

    def discard(self, row, keys, start):
        gone = set(prefixes(keys, start)) & set(self.order[row])
        self.order[row] = [p for p in self.order[row] if p not in gone]
        return len(gone)

    def path(self, row, name):
        copies = self.names[row].get(name)
        return copies and list(copies[0])

    def match(self, keys, row, start=0):
        held = self.held(row)
        reached = start
        for prefix in prefixes(keys, start):
            if prefix not in held:
                break
            reached += 1
        return reached

    def blocks(self, row):
        return len(self.held(row))

    def unique_blocks(self):
        return len(set().union(*(self.held(row) for row in self.capacity)))

    def edges(self):
        """The one set of nodes for this content: (start, keys, rows), in the order of their paths.

        A block lies on one edge with the block above it if that has no other child, if the same rows hold
        both, and if in each bounded one of these rows it leaves right before the block above it.
        """
        rows = {}
        for row in self.capacity:
            for held in self.held(row):
                for prefix in prefixes(held):
                    rows.setdefault(prefix, set())
                rows[held].add(row)
        children = Counter(prefix[:-1] for prefix in rows)
        neighbours = {
            row: set(pairwise(order)) for row, order in self.order.items() if self.capacity[row] >= 0
        }
        nodes = []
        for prefix in sorted(rows):
            above = prefix[:-1]
            if (
                above
                and children[above] == 1
                and rows[above] == rows[prefix]
                and all((prefix, above) in neighbours[row] for row in rows[prefix] & neighbours.keys())
            ):
                nodes[-1][1].append(prefix[-1])
            else:
                nodes.append((len(above), [prefix[-1]], sorted(rows[prefix])))
        return nodes
