"""What a step costs: FLOPs by formula, as traced and as compiled; attention's pairs."""
