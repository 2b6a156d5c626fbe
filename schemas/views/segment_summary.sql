-- Each month by segment and value: ads, their mean probability, and how many of them were scored without a picture or without a model.
SELECT
  month,
  s.segment,
  s.value,
  COUNT(*) AS ads,
  AVG(p_click) AS mean_p_click,
  COUNTIF(score_status = 'no_image') AS without_image,
  COUNTIF(score_status = 'fallback') AS fallback
FROM `{dataset}.scores` CROSS JOIN UNNEST({segments}) AS s
GROUP BY month, s.segment, s.value
