-- Weeks that cannot be: parts larger than the whole, a median or a mean above the largest basket.
SELECT week, order_count, basket_count, single_item_count, no_charge_count, basket_value, median_basket, largest_basket
FROM weekly_baskets
WHERE basket_count > order_count
  OR single_item_count > basket_count
  OR no_charge_count > basket_count
  OR basket_value > largest_basket
  OR median_basket > largest_basket;
