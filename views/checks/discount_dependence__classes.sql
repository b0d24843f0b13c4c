-- Users in a class that is none, or that contradicts their share; and shares that do not follow from the money. A share is
-- rounded, so that only the class of one that lies on a limit may be either.
SELECT user_id, revenue, discount, discount_share, dependence
FROM discount_dependence
WHERE dependence IS NULL
  OR (dependence = 'none') <> (discount = 0)
  OR (dependence = 'low' AND discount_share > NUMERIC '0.1')
  OR (dependence = 'medium' AND discount_share NOT BETWEEN NUMERIC '0.1' AND NUMERIC '0.2')
  OR (dependence = 'high' AND discount_share < NUMERIC '0.2')
  OR dependence NOT IN ('none', 'low', 'medium', 'high')
  OR (discount_share IS NULL) <> (revenue + discount = 0)
  OR ABS(discount_share * (revenue + discount) - discount) > NUMERIC '0.00005' * (revenue + discount);
