-- Each month's ads whose picture was not used whole, by what is wrong with it: how many, and their share of the month.
SELECT * FROM (
  SELECT month, image_status, COUNT(*) AS ads, COUNT(*) / SUM(COUNT(*)) OVER (PARTITION BY month) AS share
  FROM `{dataset}.scores` GROUP BY month, image_status
)
WHERE image_status != 'ok'
