-- Every segment value of last month is there again; where one is gone for good, list it as publish.gone: COLUMN=VALUE.
SELECT s.segment, s.value FROM `{scores}` CROSS JOIN UNNEST({segments}) AS s WHERE month = DATE '{last}-01' AND s.value IS NOT NULL
EXCEPT DISTINCT (
  SELECT s.segment, s.value FROM `{staging}` CROSS JOIN UNNEST({segments}) AS s
  UNION ALL
  SELECT g.segment, g.value FROM UNNEST({gone}) AS g
)
