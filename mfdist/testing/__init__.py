"""What tests of mfdist, and of tables written elsewhere, are judged by: oracles and one table of tolerances."""
