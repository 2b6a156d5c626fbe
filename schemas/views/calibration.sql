-- Each month's scores against what happened to the same ads in the month after, by probability, in bins that double; 1 is calibrated.
SELECT
  scores.month,
  POW(2, FLOOR(LOG(scores.p_click, 2))) AS p_click_from,
  COUNT(*) AS ads,
  SUM(outcomes.impressions) AS impressions,
  SUM(outcomes.clicks) AS clicks,
  SUM(scores.p_click * outcomes.impressions) AS predicted_clicks,
  SAFE_DIVIDE(SUM(scores.p_click * outcomes.impressions), SUM(outcomes.clicks)) AS calibration
FROM `{dataset}.scores` AS scores
JOIN `{dataset}.outcomes` AS outcomes ON outcomes.key = scores.key AND outcomes.month = DATE_ADD(scores.month, INTERVAL 1 MONTH)
GROUP BY scores.month, p_click_from
