-- The mean stays within publish.max_mean_shift of last month's; where it is right that it does not, publish with --accept-shift.
SELECT staged.mean AS mean, past.mean AS last_mean
FROM (SELECT AVG(p_click) AS mean FROM `{staging}`) AS staged
CROSS JOIN (SELECT AVG(p_click) AS mean FROM `{scores}` WHERE month = DATE '{last}-01') AS past
WHERE ABS(staged.mean - past.mean) > {max_mean_shift} * past.mean
