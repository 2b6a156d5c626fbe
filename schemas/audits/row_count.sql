-- As many rows are staged as the ledger counts.
SELECT COUNT(*) AS staged, {rows} AS expected FROM `{staging}` HAVING COUNT(*) != {rows}
