"""The rules, by what they look at: one function a rule, all of them in the table `rankwise.linting.table.LINTS`."""
