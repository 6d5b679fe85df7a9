"""What a run needs that the paper does not speak of. Skip it unless you change how runs stop or
fit."""
