-- A click is neither impossible nor certain.
SELECT `key`, p_click FROM `{staging}` WHERE NOT (p_click > 0 AND p_click < 1)
