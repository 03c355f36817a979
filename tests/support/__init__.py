"""What tests share: oracle, mutants, goldens, tables of faults and meshes, the smallest run."""
