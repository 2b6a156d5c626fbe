-- The latest published month against the month before: each ad of either, its probability in both, and what changed.
WITH latest AS (SELECT MAX(month) AS month FROM `{dataset}.runs`),
  this_month AS (SELECT * FROM `{dataset}.scores` WHERE month = (SELECT month FROM latest)),
  last_month AS (SELECT * FROM `{dataset}.scores` WHERE month = (SELECT DATE_SUB(month, INTERVAL 1 MONTH) FROM latest))
SELECT
  (SELECT month FROM latest) AS month,
  COALESCE(this_month.key, last_month.key) AS `key`,
  CASE WHEN last_month.key IS NULL THEN 'new' WHEN this_month.key IS NULL THEN 'gone' ELSE 'kept' END AS ad,
  last_month.p_click AS last_p_click,
  this_month.p_click AS p_click,
  this_month.p_click - last_month.p_click AS difference,
  last_month.creative IS DISTINCT FROM this_month.creative AS new_creative,
  last_month.model_version IS DISTINCT FROM this_month.model_version AS new_model
FROM this_month FULL JOIN last_month ON last_month.key = this_month.key
