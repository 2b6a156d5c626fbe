-- What must be said of every row is said.
SELECT * FROM `{staging}`
WHERE `key` IS NULL OR month IS NULL OR p_click IS NULL OR image_status IS NULL OR score_status IS NULL
  OR encoder_version IS NULL OR model_version IS NULL OR run_id IS NULL
