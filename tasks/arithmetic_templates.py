"""The stories of tasks/arithmetic.py: plain data, one tuple per template.

The first string is the question; those after it are its steps, "label: expression". In a question {a} to {f} are
amounts of 2 to 60, {m} to {q} small numbers of 2 to 12, {x} a large one of 50 to 200. An expression is one operation
on such letters and on r1, r2, r3, the results of the steps before it. All other words in braces are drawn from WORDS;
{things2} is never the same as {things}. {he} and {He} go with {name}.
"""

from collections.abc import Sequence

GIRLS = "Amy Anna Ella Emma Eva Jane Kate Lily Lisa Lucy Maria Maya Mia Nina Nora Rosa Ruth Sara Sue Zoe".split()
BOYS = "Adam Alex Ben Carl Dan David Eric Ivan Jack John Leo Luke Mark Max Noah Omar Paul Peter Sam Tom".split()

WORDS: dict[str, Sequence[str]] = {
    "name": (*GIRLS, *BOYS),
    "things": "balls beads books buttons caps cards coins dolls keys marbles pens photos stamps stickers toys".split(),
    "thing": "ball bell book cap card cup doll game hat kite lamp map pen plant ring toy".split(),
    "fruits": "apples bananas figs lemons limes mangoes oranges peaches pears plums".split(),
    "treats": "biscuits buns cakes cookies muffins pies rolls tarts".split(),
    "animals": "cows ducks geese goats hens horses pigs sheep".split(),
    "flowers": "daisies lilies roses tulips".split(),
    "color": "black blue brown green pink red white yellow".split(),
    "day": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split(),
}

ONE_STEP = (
    (
        "{name} has {a} {things}. {He} gets {b} more. How many {things} does {he} have now?",
        "{things}: a+b",
    ),
    (
        "In the morning {name} sells {a} {fruits}. Later {he} sells {b} more. How many {fruits} does {he} sell?",
        "{fruits} sold: a+b",
    ),
    (
        "{name} is {a} years old. {name2} is {m} years older than {name}. How old is {name2}?",
        "{name2}: a+m",
    ),
    (
        "A farm has {a} {animals} and {b} {animals2}. How many animals does it have?",
        "animals: a+b",
    ),
    (
        "{name} gives away {a} {things}. Now {he} has {b} left. How many {things} did {he} have before?",
        "{things} before: a+b",
    ),
    (
        "{name} has {a} {things}. {He} gives {b} of them to {name2}. How many {things} does {name} have left?",
        "{things} left: a-b",
    ),
    (
        "There are {a} people on a {color} bus. At the next stop {b} people get off. How many people are left?",
        "people: a-b",
    ),
    (
        "A {color} rope is {a} meters long. {name} cuts off {b} meters. How many meters long is the rope now?",
        "meters: a-b",
    ),
    (
        "{name} has {a} {things} and {name2} has {b}. How many more {things} does {name} have than {name2}?",
        "more {things}: a-b",
    ),
    (
        "{name} has {a} dollars. {He} wants a {thing} that costs {b} dollars. How many more dollars does {he} need?",
        "dollars: b-a",
    ),
    (
        "{name} finds {a} {things}. Now {he} has {b} {things}. How many {things} did {he} have before?",
        "{things} before: b-a",
    ),
    (
        "A box has room for {a} {fruits}. There are {b} {fruits} in it. How many more {fruits} can go in?",
        "more {fruits}: a-b",
    ),
    (
        "{name} fills {m} bags with {a} {fruits} in each bag. How many {fruits} does {he} need?",
        "{fruits}: m*a",
    ),
    (
        "A {thing} costs {a} dollars. {name} buys {m} of them. How many dollars does {he} pay?",
        "dollars: a*m",
    ),
    (
        "{name} reads {a} pages every day. How many pages does {he} read in {m} days?",
        "pages: a*m",
    ),
    (
        "{name} plants {m} rows of {flowers} with {n} {flowers} in each row. How many {flowers} does {he} plant?",
        "{flowers}: m*n",
    ),
    (
        "{name} works {m} hours a day. How many hours does {he} work in {a} days?",
        "hours: m*a",
    ),
    (
        "{name} puts {a} {things} into {m} boxes, the same number in each. How many {things} are in each box?",
        "{things} in each box: a/m",
    ),
    (
        "{name} needs cars for {a} children. Each car takes {m} children. How many cars does {he} need?",
        "cars: a/m",
    ),
    (
        "{name} runs {m} miles a day. How many days does {he} need to run {a} miles?",
        "days: a/m",
    ),
    (
        "{name} pays {a} dollars for {m} {things}. How many dollars does one cost?",
        "dollars for one: a/m",
    ),
    (
        "{name} shares {a} {treats} equally among {m} children. How many {treats} does each child get?",
        "{treats} for each child: a/m",
    ),
)

TWO_STEPS = (
    (
        "{name} has {a} {things}. {He} gets {b} more and gives {c} to {name2}. How many {things} does {name} have now?",
        "with the new ones: a+b",
        "left: r1-c",
    ),
    (
        "{name} has {a} {things}. {He} gives {b} to {name2} and {c} to {name3}. "
        "How many {things} does {name} have left?",
        "after {name2}: a-b",
        "after {name3}: r1-c",
    ),
    (
        "{name} has {m} boxes with {n} {things} in each box. {He} also has {a} other {things}. "
        "How many {things} does {he} have?",
        "in boxes: m*n",
        "{things}: r1+a",
    ),
    (
        "There are {m} bags with {a} {fruits} in each bag. {b} of the {fruits} are bad. How many {fruits} are good?",
        "{fruits}: m*a",
        "good: r1-b",
    ),
    (
        "{name} has {a} {things} and buys {b} more. {He} puts them all into {m} boxes, the same number in each. "
        "How many {things} are in each box?",
        "{things}: a+b",
        "in each box: r1/m",
    ),
    (
        "{name} bakes {a} {treats}. {He} keeps {m} and shares the rest equally among {n} friends. "
        "How many {treats} does each friend get?",
        "the rest: a-m",
        "for each friend: r1/n",
    ),
    (
        "A {thing} costs {m} dollars. {name} buys {n} of them and pays with {a} dollars. "
        "How many dollars does {he} get back?",
        "price: m*n",
        "back: a-r1",
    ),
    (
        "{name} earns {m} dollars an hour. {He} works {n} hours on {day} and {p} hours on {day2}. "
        "How many dollars does {he} earn?",
        "hours: n+p",
        "dollars: m*r1",
    ),
    (
        "{name} has {a} {things}. {name2} has {b} more {things} than {name}. How many {things} do they have together?",
        "{name2}: a+b",
        "together: a+r1",
    ),
    (
        "{name} has {a} {things}. {name2} has {b} fewer {things} than {name}. How many {things} do they have together?",
        "{name2}: a-b",
        "together: a+r1",
    ),
    (
        "{name} has {a} {things}. {name2} has {m} times as many {things} as {name}. "
        "How many {things} do they have together?",
        "{name2}: m*a",
        "together: a+r1",
    ),
    (
        "{name} has {a} {color} beads and {b} {color2} beads. {He} needs {m} beads to make one ring. "
        "How many rings can {he} make?",
        "beads: a+b",
        "rings: r1/m",
    ),
    (
        "A book has {x} pages. {name} has read {a} pages. Now {he} reads {m} pages a day. "
        "How many days does {he} need for the rest?",
        "pages left: x-a",
        "days: r1/m",
    ),
    (
        "There are {a} people on a {color} bus. At the next stop {b} people get off and {c} people get on. "
        "How many people are on the bus now?",
        "after {b} get off: a-b",
        "after {c} get on: r1+c",
    ),
    (
        "A {color} room has {m} tables with {n} chairs each. {a} people sit down. How many chairs are free?",
        "chairs: m*n",
        "free: r1-a",
    ),
    (
        "{name} buys {m} packs of {n} {things}. {He} shares them equally among {p} children. "
        "How many {things} does each child get?",
        "{things}: m*n",
        "for each child: r1/p",
    ),
    (
        "{name} pays {a} dollars for {m} tickets. {name2} buys {n} of the same tickets. "
        "How many dollars does {name2} pay?",
        "one ticket: a/m",
        "{n} tickets: r1*n",
    ),
    (
        "{name} walks {a} miles in {m} days, the same every day. How many miles does {he} walk in {n} days?",
        "miles in one day: a/m",
        "miles: r1*n",
    ),
    (
        "A school has {a} girls and {b} boys. Today {m} children are sick. How many children are at school today?",
        "children: a+b",
        "at school: r1-m",
    ),
    (
        "{name} wants a bike that costs {x} dollars. {He} has {a} dollars and saves {m} dollars a week. "
        "How many weeks does {he} need?",
        "dollars needed: x-a",
        "weeks: r1/m",
    ),
    (
        "A shop has {x} {things}. It sells {m} {things} a day. How many {things} does it have left after {n} days?",
        "sold: m*n",
        "left: x-r1",
    ),
)

THREE_STEPS = (
    (
        "{name} has {m} boxes with {n} {things} in each and {p} bags with {q} {things} in each. "
        "How many {things} does {he} have?",
        "in boxes: m*n",
        "in bags: p*q",
        "{things}: r1+r2",
    ),
    (
        "{name} picks {a} {fruits} and {name2} picks {b}. They throw away {m} bad ones. "
        "The rest go into {n} bags, the same number in each. How many {fruits} are in each bag?",
        "{fruits}: a+b",
        "good: r1-m",
        "in each bag: r2/n",
    ),
    (
        "{name} buys {m} pens for {n} dollars each and a {thing} for {a} dollars. {He} pays with {x} dollars. "
        "How many dollars does {he} get back?",
        "pens: m*n",
        "price: r1+a",
        "back: x-r2",
    ),
    (
        "There are {a} people on a train. At the first stop {b} get off and {c} get on. At the next stop {d} get off. "
        "How many people are on the train now?",
        "after {b} get off: a-b",
        "after {c} get on: r1+c",
        "after {d} get off: r2-d",
    ),
    (
        "{name} has {a} {things}. {name2} has {b} more than {name}. {name3} has {c} fewer than {name2}. "
        "How many {things} do {name} and {name3} have together?",
        "{name2}: a+b",
        "{name3}: r1-c",
        "together: a+r2",
    ),
    (
        "{name} plants {m} rows of {n} {flowers}. {a} of them die. {He} sells the rest for {p} dollars each. "
        "How many dollars does {he} get?",
        "{flowers}: m*n",
        "left: r1-a",
        "dollars: r2*p",
    ),
    (
        "{name} bakes {m} trays with {n} {treats} on each. {He} keeps {a} and puts the rest into bags of {p}. "
        "How many bags does {he} fill?",
        "{treats}: m*n",
        "the rest: r1-a",
        "bags: r2/p",
    ),
    (
        "{name} has {a} dollars. {He} works {m} hours for {n} dollars an hour. "
        "Then {he} buys a {thing} for {b} dollars. How many dollars does {he} have left?",
        "earned: m*n",
        "dollars: a+r1",
        "left: r2-b",
    ),
    (
        "A farm has {a} white hens and {b} brown hens. Each hen lays {m} eggs. The eggs go into boxes of {n}. "
        "How many boxes are there?",
        "hens: a+b",
        "eggs: r1*m",
        "boxes: r2/n",
    ),
    (
        "The {color} team has {m} players and each scores {n} points. The {color2} team has {p} players "
        "and each scores {q} points. How many more points does the {color} team have?",
        "{color} team: m*n",
        "{color2} team: p*q",
        "more points: r1-r2",
    ),
    (
        "A book has {x} pages. {name} reads {m} pages a day for {n} days. Then {he} reads {a} more pages. "
        "How many pages are left?",
        "in {n} days: m*n",
        "left then: x-r1",
        "left now: r2-a",
    ),
    (
        "{name} has {a} {things}, {name2} has {b} and {name3} has {c}. They put them all into {m} boxes, "
        "the same number in each. How many {things} are in each box?",
        "{name} and {name2}: a+b",
        "all three: r1+c",
        "in each box: r2/m",
    ),
    (
        "{name} pays {a} dollars for {m} tickets. {name2} buys {n} of the same tickets and a {thing} for {b} dollars. "
        "How many dollars does {name2} pay?",
        "one ticket: a/m",
        "{n} tickets: r1*n",
        "dollars: r2+b",
    ),
    (
        "A shop has {m} boxes with {n} {things} in each. It sells {a} {things} and then gets {b} new ones. "
        "How many {things} does it have now?",
        "{things}: m*n",
        "left: r1-a",
        "with the new ones: r2+b",
    ),
    (
        "{name} has {a} {things}. {name2} has {m} times as many as {name}. {name3} has {b} fewer than {name2}. "
        "How many {things} do {name2} and {name3} have together?",
        "{name2}: m*a",
        "{name3}: r1-b",
        "together: r1+r2",
    ),
    (
        "A tank has {x} liters of water. A cow drinks {m} liters a day for {n} days. Then {name} adds {a} liters. "
        "How many liters are in the tank now?",
        "the cow drinks: m*n",
        "left: x-r1",
        "liters: r2+a",
    ),
    (
        "{name} pays {a} dollars for {m} {things}. {name2} pays {b} dollars for {n} {things}. "
        "How many more dollars does {name} pay for one than {name2}?",
        "{name}: a/m",
        "{name2}: b/n",
        "more: r1-r2",
    ),
)

FOUR_STEPS = (
    (
        "{name} has {m} boxes with {n} {things} in each and {p} bags with {q} {things} in each. "
        "{He} gives {a} {things} to {name2}. How many {things} does {name} have left?",
        "in boxes: m*n",
        "in bags: p*q",
        "{things}: r1+r2",
        "left: r3-a",
    ),
    (
        "{name} picks {a} {fruits} and {name2} picks {b}. They throw away {m} bad ones "
        "and put the rest into bags of {n}. They sell each bag for {p} dollars. How many dollars do they get?",
        "{fruits}: a+b",
        "good: r1-m",
        "bags: r2/n",
        "dollars: r3*p",
    ),
    (
        "{name} bakes {m} trays with {n} {treats} on each. {He} keeps {a} and puts the rest into bags of {p}. "
        "{He} sells each bag for {q} dollars. How many dollars does {he} get?",
        "{treats}: m*n",
        "the rest: r1-a",
        "bags: r2/p",
        "dollars: r3*q",
    ),
    (
        "There are {a} people on a train. At the first stop {b} get off and {c} get on. At the next stop {d} get off "
        "and {e} get on. How many people are on the train now?",
        "after {b} get off: a-b",
        "after {c} get on: r1+c",
        "after {d} get off: r2-d",
        "after {e} get on: r3+e",
    ),
    (
        "{name} has {a} {things}. {name2} has {b} more than {name}. {name3} has {c} fewer than {name2}. "
        "How many {things} do all three have together?",
        "{name2}: a+b",
        "{name3}: r1-c",
        "{name} and {name2}: a+r1",
        "all three: r3+r2",
    ),
    (
        "{name} works {m} hours on {day} and {n} hours on {day2} for {p} dollars an hour. {He} keeps {a} dollars "
        "and shares the rest equally among {q} children. How many dollars does each child get?",
        "hours: m+n",
        "dollars: r1*p",
        "the rest: r2-a",
        "for each child: r3/q",
    ),
    (
        "{name} has {m} packs of {n} {things} and {name2} has {p} packs of {q} {things}. "
        "They put them all into {o} boxes, the same number in each. How many {things} are in each box?",
        "{name}: m*n",
        "{name2}: p*q",
        "together: r1+r2",
        "in each box: r3/o",
    ),
    (
        "A farm has {a} white hens and {b} brown hens. Each hen lays {m} eggs. {c} eggs break. "
        "The rest go into boxes of {n}. How many boxes are there?",
        "hens: a+b",
        "eggs: r1*m",
        "good eggs: r2-c",
        "boxes: r3/n",
    ),
    (
        "A book has {x} pages. {name} reads {m} pages a day for {n} days. Then {he} reads {a} more pages. "
        "{He} wants to read the rest in {p} days. How many pages a day is that?",
        "in {n} days: m*n",
        "left then: x-r1",
        "left now: r2-a",
        "pages a day: r3/p",
    ),
    (
        "{name} pays {a} dollars for {m} {things}. {name2} pays {b} dollars for {n}. "
        "How many more dollars would {name} pay for {p} {things} than {name2}?",
        "{name} for one: a/m",
        "{name2} for one: b/n",
        "more for one: r1-r2",
        "more for {p}: r3*p",
    ),
    (
        "{name} has {a} dollars. {He} earns {m} dollars a day for {n} days. Then {he} buys {p} tickets "
        "for {q} dollars each. How many dollars does {he} have left?",
        "earned: m*n",
        "dollars: a+r1",
        "tickets: p*q",
        "left: r2-r3",
    ),
    (
        "{name} has {a} {things} and loses {b}. {name2} has {c} {things} and finds {d} more. "
        "They put them all into {m} boxes, the same number in each. How many {things} are in each box?",
        "{name}: a-b",
        "{name2}: c+d",
        "together: r1+r2",
        "in each box: r3/m",
    ),
    (
        "{name} pours {m} buckets of {n} liters into a tank. {He} uses {a} liters. Then {he} adds {b} liters. "
        "Now {he} fills cans of {p} liters from it. How many cans can {he} fill?",
        "liters: m*n",
        "left: r1-a",
        "liters now: r2+b",
        "cans: r3/p",
    ),
    (
        "A truck can carry {x} kilos. It has {m} boxes of {n} kilos and {p} bags of {q} kilos on it. "
        "How many more kilos can it carry?",
        "boxes: m*n",
        "bags: p*q",
        "kilos: r1+r2",
        "more: x-r3",
    ),
    (
        "{name} buys {m} caps for {n} dollars each and {p} cups for {q} dollars each. {He} pays with {x} dollars. "
        "How many dollars does {he} get back?",
        "caps: m*n",
        "cups: p*q",
        "price: r1+r2",
        "back: x-r3",
    ),
)

TEMPLATES: tuple[tuple[str, ...], ...] = (*ONE_STEP, *TWO_STEPS, *THREE_STEPS, *FOUR_STEPS)
