-- A key is there once.
SELECT `key`, COUNT(*) AS times FROM `{staging}` GROUP BY `key` HAVING COUNT(*) > 1
