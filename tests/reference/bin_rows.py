"""The slow twin of nanochat/token_files.py: an epoch's rows of a list of ids, one id at a time."""


def epoch_rows(ids: list[int], first: int, sequence_len: int) -> list[list[int]]:
    """Rows of T + 1 ids from `first` on, until every id has been a target; after the last id comes the first one."""
    rows, targets = [], set[int]()
    while len(targets) < len(ids):
        row = [(first + i) % len(ids) for i in range(sequence_len + 1)]
        targets.update(row[1:])
        rows.append([ids[i] for i in row])
        first += sequence_len
    return rows
