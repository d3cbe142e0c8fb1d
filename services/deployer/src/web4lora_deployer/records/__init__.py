"""What is deployed, on disk: `deployments` holds records, names and scales, `names` the rule for ids."""
