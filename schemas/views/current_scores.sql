-- The scores of the latest published month. It reads the whole table: name a month to `scores` where bytes count.
SELECT {columns} FROM `{dataset}.scores` WHERE month = (SELECT MAX(month) FROM `{dataset}.runs`)
