from outside.harness import Catalogue
surgery = Catalogue("surgery")
