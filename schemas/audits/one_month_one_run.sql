-- Only this month and this run are staged.
SELECT `key`, month, run_id FROM `{staging}` WHERE month != DATE '{month}-01' OR run_id != '{run}'
